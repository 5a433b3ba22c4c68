;; The product of poet.js: y[m, n] += the sum of x[m, k] w[n, k] over k, four columns n and four k at a time. Each sum
;; is added up in the same order, whatever M and N are. poet.js holds it, which tests/test_html.py checks:
;; wat2wasm robopoet/weights/poet.wat --output=- | base64 -w 0
(module
  (import "js" "memory" (memory 1))
  (func (export "multiply")
    (param $y i32) (param $x i32) (param $w i32)     ;; where they begin, in bytes; float32
    (param $M i32) (param $N i32) (param $K i32)     ;; at least 1; N and K are multiples of 4
    (param $dy i32) (param $dx i32) (param $dw i32)  ;; from row to row, in bytes
    (local $w1 i32) (local $w2 i32) (local $w3 i32) (local $m i32) (local $xm i32) (local $ym i32) (local $k i32)
    (local $p v128) (local $a v128) (local $b v128) (local $c v128) (local $d v128)
    (local.set $K (i32.shl (local.get $K) (i32.const 2)))
    (loop $columns
      (local.set $w1 (i32.add (local.get $w) (local.get $dw)))
      (local.set $w2 (i32.add (local.get $w1) (local.get $dw)))
      (local.set $w3 (i32.add (local.get $w2) (local.get $dw)))
      (local.set $xm (local.get $x))
      (local.set $ym (local.get $y))
      (local.set $m (local.get $M))
      (loop $rows
        (local.set $a (v128.const i32x4 0 0 0 0))
        (local.set $b (v128.const i32x4 0 0 0 0))
        (local.set $c (v128.const i32x4 0 0 0 0))
        (local.set $d (v128.const i32x4 0 0 0 0))
        (local.set $k (i32.const 0))
        (loop $sum
          (local.set $p (v128.load (i32.add (local.get $xm) (local.get $k))))
          (local.set $a (f32x4.add (local.get $a)
            (f32x4.mul (local.get $p) (v128.load (i32.add (local.get $w) (local.get $k))))))
          (local.set $b (f32x4.add (local.get $b)
            (f32x4.mul (local.get $p) (v128.load (i32.add (local.get $w1) (local.get $k))))))
          (local.set $c (f32x4.add (local.get $c)
            (f32x4.mul (local.get $p) (v128.load (i32.add (local.get $w2) (local.get $k))))))
          (local.set $d (f32x4.add (local.get $d)
            (f32x4.mul (local.get $p) (v128.load (i32.add (local.get $w3) (local.get $k))))))
          (br_if $sum (i32.lt_u (local.tee $k (i32.add (local.get $k) (i32.const 16))) (local.get $K))))
        ;; the four lanes of a, b, c and d, added up side by side
        (local.set $p (f32x4.add                     ;; a0 + a2, b0 + b2, a1 + a3, b1 + b3
          (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $a) (local.get $b))
          (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $a) (local.get $b))))
        (local.set $c (f32x4.add                     ;; c0 + c2, d0 + d2, c1 + c3, d1 + d3
          (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $c) (local.get $d))
          (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $c) (local.get $d))))
        (v128.store (local.get $ym) (f32x4.add (v128.load (local.get $ym)) (f32x4.add
          (i8x16.shuffle 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23 (local.get $p) (local.get $c))
          (i8x16.shuffle 8 9 10 11 12 13 14 15 24 25 26 27 28 29 30 31 (local.get $p) (local.get $c)))))
        (local.set $xm (i32.add (local.get $xm) (local.get $dx)))
        (local.set $ym (i32.add (local.get $ym) (local.get $dy)))
        (br_if $rows (local.tee $m (i32.sub (local.get $m) (i32.const 1)))))
      (local.set $w (i32.add (local.get $w3) (local.get $dw)))
      (local.set $y (i32.add (local.get $y) (i32.const 16)))
      (br_if $columns (local.tee $N (i32.sub (local.get $N) (i32.const 4)))))))
