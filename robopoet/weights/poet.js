// RoboPoet in JavaScript: the model, its tokenizer, the sampler and the ends of passages, as in model.py and
// robopoet/writing/. It runs in a Worker of the page that --export=poet.html writes, or in any JavaScript engine.
// Weights are float32, and sums in WebAssembly; sums in JavaScript are float64. Shapes as in model.py; S: styles in a
// blend.
"use strict";

// ---------------------------------------------------------------------------------------------------------------------
// bytes: a string of bytes has one character, 0 to 255, for each

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

// base64 -> Uint8Array
function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text); // browsers since 2025
  const digit = new Uint8Array(128); // of "=", too, which is 0
  for (let i = 0; i < 64; i++) digit[DIGITS.charCodeAt(i)] = i;
  const padding = text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0;
  const bytes = new Uint8Array((text.length / 4) * 3 - padding);
  for (let i = 0, at = 0; i < text.length; i += 4) {
    const four = (digit[text.charCodeAt(i)] << 18) | (digit[text.charCodeAt(i + 1)] << 12) |
      (digit[text.charCodeAt(i + 2)] << 6) | digit[text.charCodeAt(i + 3)];
    bytes[at++] = four >> 16; // beyond the end of an array nothing is stored
    bytes[at++] = four >> 8;
    bytes[at++] = four;
  }
  return bytes;
}

// the number that each float16, 16 bits, stands for
const HALVES = Float32Array.from({ length: 2 ** 16 }, (_, bits) => {
  const exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  const size = exponent ? (1 + fraction) * 2 ** (exponent - 15) : fraction * 2 ** -14; // subnormal
  return bits >> 15 ? -size : size;
});

// little-endian float16 or float32 in base64 -> Float32Array
function decodeWeights(base64, dtype) {
  const bytes = decodeBase64(base64);
  if (dtype === "float32") return new Float32Array(bytes.buffer);
  const halves = new Uint16Array(bytes.buffer), weights = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) weights[i] = HALVES[halves[i]];
  return weights;
}

// text -> string of its UTF-8 bytes; half a surrogate pair becomes U+FFFD
function utf8(text) {
  let bytes = "";
  for (const char of text) {
    let code = char.codePointAt(0);
    if (code >= 0xd800 && code < 0xe000) code = 0xfffd;
    const n = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3; // bytes that continue the first
    bytes += String.fromCharCode(n ? ((0xf00 >> (n + 1)) & 0xff) | (code >> (6 * n)) : code);
    for (let i = n - 1; i >= 0; i--) bytes += String.fromCharCode(0x80 | ((code >> (6 * i)) & 63));
  }
  return bytes;
}

// Decodes UTF-8 as it arrives; what is none becomes U+FFFD, as often as in Python.
class Utf8Decoder {
  constructor() {
    this.missing = 0; // bytes that the character still needs
    this.errors = 0;
  }

  push(bytes) {
    let text = "";
    for (let i = 0; i < bytes.length; i++) {
      const byte = bytes.charCodeAt(i);
      if (this.missing && (byte < this.low || byte > this.high)) {
        text += "\ufffd";
        this.errors++;
        this.missing = 0; // and this byte begins anew
      }
      if (this.missing) {
        this.code = (this.code << 6) | (byte & 63);
        [this.low, this.high] = [0x80, 0xbf];
        if (--this.missing === 0) text += String.fromCodePoint(this.code);
      } else if (byte < 0x80) {
        text += String.fromCharCode(byte);
      } else if (byte < 0xc2 || byte > 0xf4) {
        text += "\ufffd";
        this.errors++;
      } else {
        this.missing = byte < 0xe0 ? 1 : byte < 0xf0 ? 2 : 3;
        this.code = byte & (0x3f >> this.missing);
        this.low = byte === 0xe0 ? 0xa0 : byte === 0xf0 ? 0x90 : 0x80; // no longer form than needed,
        this.high = byte === 0xed ? 0x9f : byte === 0xf4 ? 0x8f : 0xbf; // no surrogates, at most U+10FFFF
      }
    }
    return text;
  }

  // Whether what follows stays UTF-8 after these bytes; a token without text ("") may only stand between characters.
  allows(bytes) {
    const after = Object.assign(new Utf8Decoder(), this);
    after.push(bytes);
    return after.errors === this.errors && (bytes !== "" || !this.missing);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// tokenizers

const CONTRACTIONS = "'(?:[sSſtTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"; // ſ is an s to (?i:), too

// One of PATTERNS in robopoet/text/tokenizer.py as JavaScript has it. A possessive quantifier becomes a greedy one: in
// none of them could what follows match a character that it would give back.
function toRegExp(pattern) {
  const source = pattern
    .replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", CONTRACTIONS)
    .replace("'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS)
    .replace(/([+*?]|\{1,3\})\+/g, "$1")
    .replaceAll("\\s", "\\p{White_Space}")
    .replaceAll("\\S", "\\P{White_Space}");
  return new RegExp(source, "gu");
}

class Tokenizer {
  // saved: as in meta.json. this.bytes: of each id that stands for text.
  constructor(saved) {
    this.isBPE = saved.kind === "bpe";
    this.bytes = this.isBPE ? saved.tokens : [...saved.chars].map(utf8);
    this.idOf = new Map(this.bytes.map((bytes, id) => [bytes, id]));
    this.specials = new Map(saved.specials.map((name, i) => [name, this.bytes.length + i]));
    this.size = this.bytes.length + saved.specials.length;
    this.pattern = this.isBPE ? toRegExp(saved.pattern) : null;
  }

  encode(text) {
    if (this.isBPE) return (text.match(this.pattern) || []).flatMap((piece) => this.merge(utf8(piece)));
    const unknown = this.specials.get("<|unk|>");
    return [...text].map((char) => this.idOf.get(utf8(char)) ?? unknown).filter((id) => id !== undefined);
  }

  // Joins, again and again, the two neighbours that make the token of lowest id.
  merge(bytes) {
    if (this.idOf.has(bytes)) return [this.idOf.get(bytes)];
    const parts = [...bytes], rank = (i) => this.idOf.get(parts[i] + parts[i + 1]) ?? Infinity;
    const ranks = parts.map((_, i) => (i + 1 < parts.length ? rank(i) : Infinity));
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (ranks[best] === Infinity) return parts.map((part) => this.idOf.get(part));
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best, 1);
      ranks[best] = best + 1 < parts.length ? rank(best) : Infinity;
      if (best) ranks[best - 1] = rank(best - 1);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// a prompt's last word, as in robopoet/writing/healing.py

const GIVEN_TOKENS = 8, GIVEN_BYTES = 64;

// A prompt as the ids that the model reads, and its own for what a text then writes of it first.
function heal(tokenizer, text) {
  const ids = tokenizer.encode(text || "\n");
  if (!tokenizer.isBPE || !text || text.endsWith("\n")) return { read: ids, own: [] };
  const most = Math.min(utf8(text.match(tokenizer.pattern).at(-1)).length, GIVEN_BYTES);
  let n = 0, longer = "";
  for (let count = 1; count <= Math.min(GIVEN_TOKENS, ids.length); count++) {
    longer = tokenizer.bytes[ids.at(-count)] + longer;
    if (longer.length > most) break;
    if ((longer.charCodeAt(0) & 0xc0) !== 0x80) n = count; // a character begins here
  }
  const read = ids.slice(0, ids.length - n);
  return { read: read.length ? read : tokenizer.encode("\n"), own: ids.slice(read.length) };
}

// The end of a prompt that a text writes first. own: the prompt's ids for it. left: the bytes that remain. odds: after
// each of its own ids but the last, how likely what is left is written; logarithms.
class Rest {
  constructor(bytes, own) {
    Object.assign(this, { bytes, own, left: own.map((id) => bytes[id]).join(""), written: 0, odds: null });
  }

  beginning(left) {
    return [...this.bytes.keys()].filter((id) => this.bytes[id].startsWith(left));
  }

  // logprobs: the model's, after each of its own ids but the last.
  weigh(logprobs) {
    this.odds = Array(logprobs.length);
    for (let i = logprobs.length - 1; i >= 0; i--) {
      const left = this.own.slice(i + 1).map((id) => this.bytes[id]).join("");
      const ways = this.beginning(left).map((id) => logprobs[i][id]);
      if (i + 1 < logprobs.length) ways.push(logprobs[i][this.own[i + 1]] + this.odds[i + 1]);
      this.odds[i] = logSumExp(ways, 0, ways.length);
    }
  }

  // Logits (V,), given that the prompt's end is written: -Infinity for what can't write it.
  given(z) {
    const kept = new Map(this.beginning(this.left).map((id) => [id, z[id]])), own = this.own[this.written];
    if (this.bytes[own].length < this.left.length) kept.set(own, z[own] + this.odds[this.written]);
    z.fill(-Infinity);
    for (const [id, value] of kept) z[id] = value;
  }

  push(id) {
    this.left = this.left.slice(this.bytes[id].length);
    this.written++;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// the model

const CHUNK = 16; // tokens of a prompt that are read together

// poet.wat, which multiplies four numbers at a time
const PRODUCT = "AGFzbQEAAAABDQFgCX9/f39/f39/fwACDgECanMGbWVtb3J5AgABAwIBAAcMAQhtdWx0aXBseQAACscDAcQDAgd/BXsgBUECdCEFA0AgAiAIaiEJIAkgCGohCiAKIAhqIQsgASENIAAhDiADIQwDQP0MAAAAAAAAAAAAAAAAAAAAACER/QwAAAAAAAAAAAAAAAAAAAAAIRL9DAAAAAAAAAAAAAAAAAAAAAAhE/0MAAAAAAAAAAAAAAAAAAAAACEUQQAhDwNAIA0gD2r9AAQAIRAgESAQIAIgD2r9AAQA/eYB/eQBIREgEiAQIAkgD2r9AAQA/eYB/eQBIRIgEyAQIAogD2r9AAQA/eYB/eQBIRMgFCAQIAsgD2r9AAQA/eYB/eQBIRQgD0EQaiIPIAVJDQALIBEgEv0NAAECAxAREhMEBQYHFBUWFyARIBL9DQgJCgsYGRobDA0ODxwdHh/95AEhECATIBT9DQABAgMQERITBAUGBxQVFhcgEyAU/Q0ICQoLGBkaGwwNDg8cHR4f/eQBIRMgDiAO/QAEACAQIBP9DQABAgMEBQYHEBESExQVFhcgECAT/Q0ICQoLDA0ODxgZGhscHR4f/eQB/eQB/QsEACANIAdqIQ0gDiAGaiEOIAxBAWsiDA0ACyALIAhqIQIgAEEQaiEAIARBBGsiBA0ACws=";

// Float32Arrays side by side in a memory where WebAssembly multiplies; in a browser without its SIMD, plain ones.
class Arena {
  // floats: how many the arrays have together, the length of each rounded up to a multiple of four
  constructor(floats) {
    this.used = 0;
    try {
      const memory = new WebAssembly.Memory({ initial: Math.ceil(floats / 2 ** 14) });
      Arena.module ??= new WebAssembly.Module(decodeBase64(PRODUCT));
      this.product = new WebAssembly.Instance(Arena.module, { js: { memory } }).exports.multiply;
      this.buffer = memory.buffer;
    } catch {
      this.buffer = null;
    }
  }

  take(n) {
    const at = this.used;
    this.used += 16 * Math.ceil(n / 4);
    return this.buffer ? new Float32Array(this.buffer, at, n) : new Float32Array(n);
  }

  // y[m, n] += the sum of x[m, k] w[n, k] over k, of arrays that were taken here. dy, dx, dw: from row to row.
  multiply(y, x, w, M, N, K, dy = N, dx = K, dw = K) {
    let n = 0;
    if (this.buffer && K % 4 === 0 && N > 3) {
      n = N - (N % 4);
      this.product(y.byteOffset, x.byteOffset, w.byteOffset, M, n, K, 4 * dy, 4 * dx, 4 * dw);
    }
    for (; n + 3 < N; n += 4) { // four sums at a time keep the processor's adders busy
      const w0 = n * dw, w1 = w0 + dw, w2 = w1 + dw, w3 = w2 + dw;
      for (let m = 0; m < M; m++) {
        const x0 = m * dx, at = m * dy + n;
        let a = 0, b = 0, c = 0, d = 0;
        for (let k = 0; k < K; k++) {
          const p = x[x0 + k];
          a += p * w[w0 + k]; b += p * w[w1 + k]; c += p * w[w2 + k]; d += p * w[w3 + k];
        }
        y[at] += a; y[at + 1] += b; y[at + 2] += c; y[at + 3] += d;
      }
    }
    for (; n < N; n++) {
      for (let m = 0; m < M; m++) {
        let sum = 0;
        for (let k = 0; k < K; k++) sum += x[m * dx + k] * w[n * dw + k];
        y[m * dy + n] += sum;
      }
    }
  }
}

function layerNorm(y, x, w, b, M) {
  const C = w.length;
  for (let at = 0; at < M * C; at += C) {
    let mean = 0, variance = 0;
    for (let i = 0; i < C; i++) mean += x[at + i] / C;
    for (let i = 0; i < C; i++) variance += (x[at + i] - mean) ** 2 / C;
    const scale = 1 / Math.sqrt(variance + 1e-5);
    for (let i = 0; i < C; i++) y[at + i] = (x[at + i] - mean) * scale * w[i] + b[i];
  }
}

// 2 / sqrt(pi) exp(-x^2) (x + 2 x^3 / 3 + 4 x^5 / 15 + ...): Abramowitz and Stegun, 7.1.6; all terms have one sign
function erf(x) {
  if (Math.abs(x) > 4) return Math.sign(x); // 2e-8 off
  let term = x, sum = x;
  for (let n = 3; Math.abs(term) > 1e-10 * Math.abs(sum); n += 2) sum += term *= (2 * x * x) / n;
  return 1.1283791670955126 * Math.exp(-x * x) * sum;
}

// GELU at every 64th from -8 to 8, and one place more at each end
const GELU = [false, true].map((isTanh) => Float64Array.from({ length: 16 * 64 + 3 }, (_, i) => {
  const v = (i - 1) / 64 - 8;
  return 0.5 * v * (1 + (isTanh ? Math.tanh(0.7978845608028654 * (v + 0.044715 * v ** 3)) : erf(v * Math.SQRT1_2)));
}));

// Interpolated by the cubic through four places of the table: 4e-9 off.
function gelu(x, n, isTanh) {
  const table = GELU[Number(isTanh)];
  for (let i = 0; i < n; i++) {
    if (!(x[i] < 8)) continue; // itself
    const place = Math.max(x[i] + 8, 0) * 64, k = Math.floor(place), t = place - k;
    const a = table[k], b = table[k + 1], c = table[k + 2], d = table[k + 3];
    x[i] = b + t * (c - b / 2 - a / 3 - d / 6 + t * ((a + c) / 2 - b + t * ((d - a) / 6 + (b - c) / 2)));
  }
}

class Model {
  // config: GPTConfig's fields. weights: name -> Float32Array, as in a state dict, which are taken out of it; missing
  // biases are zeros. most: rows that a blend may have.
  constructor(config, weights, most = 1) {
    const { n_embd: C, n_layer, n_head, block_size, vocab_size } = config, M = Math.max(most, CHUNK);
    Object.assign(this, { config, C, headSize: C / n_head, isRotary: config.positions === "rotary" });
    const activations = [M * C, M * C, 3 * M * C, 4 * M * C, most * vocab_size];
    const sizes = [...Object.values(weights).map((w) => w.length), ...activations];
    this.arena = new Arena(sizes.reduce((sum, n) => sum + n + 3, 0));
    const take = (name) => {
      const taken = this.arena.take(weights[name].length);
      taken.set(weights[name]);
      delete weights[name];
      return taken;
    };
    const layer = (name, width) =>
      ({ w: take(`${name}.weight`), b: `${name}.bias` in weights ? take(`${name}.bias`) : new Float32Array(width) });
    this.wte = layer("transformer.wte", vocab_size);
    this.wpe = this.isRotary ? null : take("transformer.wpe.weight");
    this.ln_f = layer("transformer.ln_f", C);
    this.blocks = Array.from({ length: n_layer }, (_, i) => {
      const at = (name, width) => layer(`transformer.h.${i}.${name}`, width);
      return { ln_1: at("ln_1", C), c_attn: at("attn.c_attn", 3 * C), attn_c_proj: at("attn.c_proj", C),
        ln_2: at("ln_2", C), c_fc: at("mlp.c_fc", 4 * C), mlp_c_proj: at("mlp.c_proj", C) };
    });
    this.frequencies = Float32Array.from({ length: this.headSize / 2 },
      (_, i) => 1 / Math.fround(config.rope_theta ** Math.fround((2 * i) / this.headSize)));
    [this.x, this.h, this.qkv, this.fc, this.allLogits] = activations.map((n) => this.arena.take(n));
    [this.ids, this.rows, this.places] = [0, 0, 0].map(() => new Int32Array(M)); // of each token; where its keys go
    this.width = Math.ceil(block_size / 4) * 4; // places in a cache
  }

  // Empty caches of S rows: keys (places, C) and values (C, places) of each layer and row, and the same by head.
  start(S) {
    const { C, headSize, width, config: { n_layer, n_head, vocab_size } } = this, size = width * C;
    Object.assign(this, { S, length: 0, logits: this.allLogits.subarray(0, S * vocab_size) });
    if (this.keys?.length === n_layer * S) return;
    const room = this.cache = new Arena(2 * n_layer * S * size + 2 * C + width);
    const byHead = (array, step) => Array.from({ length: n_head }, (_, i) => array.subarray(i * step));
    const perRow = (n) => Array.from({ length: n_layer * S }, () => room.take(n)); // layer by layer
    [this.keys, this.values] = [perRow(size), perRow(size)];
    this.first = this.keys.map(() => new Float32Array(C));
    this.keysByHead = this.keys.map((keys) => byHead(keys, headSize));
    this.valuesByHead = this.values.map((values) => byHead(values, headSize * width));
    [this.q, this.y, this.scores] = [C, C, width].map((n) => room.take(n));
    [this.qByHead, this.yByHead] = [this.q, this.y].map((array) => byHead(array, headSize));
  }

  // Reads a window from its first position on; leaves the logits after it. Yields after each chunk, to be stopped.
  // window: ids, at most block_size. tags: of each row, ids that replace the first; or empty.
  *read(window, tags) {
    this.length = window.length;
    for (let row = 0; row < this.S; row++) {
      for (let start = 0; start < window.length; start += CHUNK) {
        const M = Math.min(CHUNK, window.length - start);
        for (let m = 0; m < M; m++) {
          this.ids[m] = start + m === 0 && tags.length ? tags[row] : window[start + m];
          this.rows[m] = row;
          this.places[m] = start + m;
        }
        this.forward(M, start, 1);
        if (start === 0) {
          for (let l = row; l < this.keys.length; l += this.S) this.first[l].set(this.keys[l].subarray(0, this.C));
        }
        if (start + M === window.length) this.head(M - 1, 1, row);
        yield null;
      }
    }
  }

  // Logits after one more token, the same in each row. With rotary positions a full cache is a ring behind the first
  // token, whose keys are rotated to stay block_size - 1 before this one: see generate.py.
  step(id) {
    const n = this.length++, last = this.config.block_size - 1;
    if (n > last) {
      this.keys.forEach((keys, l) => {
        keys.set(this.first[l]);
        this.rotate(keys, 0, n - last);
      });
    }
    this.ids.fill(id, 0, this.S);
    this.places.fill(n > last ? 1 + ((n - 1) % last) : n, 0, this.S);
    for (let row = 0; row < this.S; row++) this.rows[row] = row;
    this.forward(this.S, n, 0);
    this.head(0, this.S, 0);
  }

  // M tokens through all blocks, into x; token m stands at `position + stride * m`.
  forward(M, position, stride) {
    const { C, S, x, h, qkv, fc, q, y, wte, wpe, width } = this;
    for (let m = 0; m < M; m++) {
      const from = this.ids[m] * C, at = this.places[m] * C;
      for (let i = 0; i < C; i++) x[m * C + i] = wte.w[from + i] + (wpe ? wpe[at + i] : 0);
    }
    this.blocks.forEach((block, layer) => {
      layerNorm(h, x, block.ln_1.w, block.ln_1.b, M);
      this.linear(qkv, h, block.c_attn, M);
      for (let m = 0; m < M; m++) {
        const from = 3 * m * C, cache = layer * S + this.rows[m], place = this.places[m];
        const keys = this.keys[cache], values = this.values[cache];
        if (this.isRotary) {
          this.rotate(qkv, from, position + stride * m);
          this.rotate(qkv, from + C, position + stride * m);
        }
        for (let i = 0; i < C; i++) {
          q[i] = qkv[from + i];
          keys[place * C + i] = qkv[from + C + i];
          values[i * width + place] = qkv[from + 2 * C + i];
        }
        this.attend(cache, Math.min(position + stride * m + 1, this.config.block_size));
        for (let i = 0; i < C; i++) h[m * C + i] = y[i];
      }
      this.linear(x, h, block.attn_c_proj, M, true);
      layerNorm(h, x, block.ln_2.w, block.ln_2.b, M);
      this.linear(fc, h, block.c_fc, M);
      gelu(fc, M * 4 * C, this.config.gelu === "tanh");
      this.linear(x, fc, block.mlp_c_proj, M, true);
    });
  }

  // y = x w' + b, or added to y: x (M, K), w (N, K), b (N,), y (M, N)
  linear(y, x, { w, b }, M, add = false) {
    const N = b.length;
    if (!add) for (let m = 0; m < M; m++) y.set(b, m * N);
    else for (let m = 0; m < M; m++) for (let n = 0; n < N; n++) y[m * N + n] += b[n];
    this.arena.multiply(y, x, w, M, N, w.length / N);
  }

  // y = softmax(q keys' / sqrt(hs)) values, head by head, over the filled places of a cache
  attend(cache, filled) {
    const { C, headSize, width, scores, y } = this, scale = 1 / Math.sqrt(headSize);
    const near = Math.ceil(filled / 4) * 4; // so many places are multiplied; the last ones' share is 0
    y.fill(0);
    for (let head = 0; head < this.config.n_head; head++) {
      let largest = -Infinity, total = 0;
      scores.fill(0, 0, near);
      const q = this.qByHead[head], keys = this.keysByHead[cache][head], values = this.valuesByHead[cache][head];
      this.cache.multiply(scores, q, keys, 1, near, headSize, near, headSize, C);
      for (let t = 0; t < filled; t++) if (scores[t] > largest) largest = scores[t];
      for (let t = 0; t < filled; t++) total += scores[t] = Math.exp((scores[t] - largest) * scale);
      for (let t = 0; t < filled; t++) scores[t] /= total;
      scores.fill(0, filled, near);
      this.cache.multiply(this.yByHead[head], scores, values, 1, headSize, near, headSize, near, width);
    }
  }

  // The pairs (x[i], x[i + hs / 2]) of each head, turned by the angles of a position, rounded as in model.py.
  rotate(x, at, position) {
    const half = this.headSize / 2;
    for (let i = 0; i < half; i++) {
      const angle = Math.fround(position * this.frequencies[i]), cos = Math.cos(angle), sin = Math.sin(angle);
      for (let j = at + i; j < at + this.C; j += 2 * half) {
        const a = x[j], b = x[j + half];
        x[j] = a * cos - b * sin;
        x[j + half] = a * sin + b * cos;
      }
    }
  }

  // The logits of M tokens of x, from token `from` on, as rows of the logits from `row` on.
  head(from, M, row) {
    if (from) this.x.copyWithin(0, from * this.C, (from + M) * this.C);
    layerNorm(this.h, this.x, this.ln_f.w, this.ln_f.b, M);
    this.linear(this.logits.subarray(row * this.config.vocab_size), this.h, this.wte, M);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// sampling

const DEFAULTS = { // Settings in robopoet/writing/passage.py; style: name -> share
  style: {}, max_new_tokens: 300, until: "auto", stop: [], seed: 1337,
  repetition_penalty: 1, no_repeat_ngram: 0, temperature: 0.9, top_k: 0, top_p: 0.95, min_p: 0,
};

// Uniform numbers in [0, 1) with 32 bits: Chris Doty-Humphrey's sfc32. Not numpy's: a seed gives another text here.
function random(seed) {
  let a = seed >>> 0, b = Math.floor(seed / 2 ** 32) >>> 0, c = 0x9e3779b9, counter = 1;
  const next = () => {
    const t = (a + b + counter++) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + t | 0;
    return (t >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 15; i++) next();
  return next;
}

// Turns logits, (V,), into probabilities, unnormalised. top_k, top_p and min_p each drop what is less probable than
// some floor; one sort finds the floors. scratch: (V,).
function filter(probs, logits, scratch, { temperature, top_k, top_p, min_p }) {
  const V = probs.length, k = top_k ? Math.min(top_k, V) : V;
  let largest = -Infinity, floor = 0, total = 0, above = 0, n = 0;
  for (let v = 0; v < V; v++) if (logits[v] > largest) largest = logits[v];
  for (let v = 0; v < V; v++) total += probs[v] = Math.exp((logits[v] - largest) / temperature);
  if (k < V || top_p < 1) {
    const least = k < V ? 0 : ((1 - top_p) * total) / V; // all that are less probable add up to less than 1 - top_p
    for (let v = 0; v < V; v++) if (probs[v] >= least) scratch[n++] = probs[v];
    scratch.subarray(0, n).sort();
    if (k < V) total = scratch.subarray(n - k, n).reduce((sum, p) => sum + p, 0);
    for (let i = n - 1; i >= Math.max(n - k, 0) && above < top_p * total;) {
      floor = scratch[i];
      for (; i >= 0 && scratch[i] === floor; i--) above += floor; // equals stay or go together
    }
  }
  floor = Math.max(floor, min_p); // the likeliest has 1
  for (let v = 0; v < V; v++) if (probs[v] < floor) probs[v] = 0;
  return probs;
}

class Sampler {
  // weights: of the styles, (S,). prompt: ids. bytes: of each id that stands for text. rest: what is written first.
  constructor(settings, V, forbidden, weights, prompt, bytes = [], rest = null) {
    Object.assign(this, { settings, V, forbidden, weights, bytes, rest, ngrams: new Map(), tail: [] });
    this.decoder = new Utf8Decoder(); // of the text so far
    this.random = random(settings.seed);
    [this.z, this.own, this.probs, this.scratch] = Array.from({ length: 4 }, () => new Float64Array(V));
    this.seen = new Set();
    this.push(prompt);
  }

  push(ids) {
    const n = this.settings.no_repeat_ngram;
    for (const id of ids) {
      if (this.settings.repetition_penalty !== 1) this.seen.add(id);
      if (!n) continue;
      if (this.tail.length === n - 1) {
        const key = this.tail.join();
        if (!this.ngrams.has(key)) this.ngrams.set(key, new Set());
        this.ngrams.get(key).add(id);
      }
      this.tail.push(id);
      if (this.tail.length > n - 1) this.tail.shift();
    }
  }

  // Logits (S, V) -> the next id.
  next(logits) {
    const { z, V, weights, settings } = this;
    z.fill(0);
    for (let row = 0; row < weights.length; row++) {
      for (const id of this.forbidden) logits[row * V + id] = -Infinity;
      const mean = weights.length > 1 ? logSumExp(logits, row * V, V) : 0;
      for (let v = 0; v < V; v++) z[v] += weights[row] * (logits[row * V + v] - mean);
    }
    this.own.set(z);
    if (this.rest?.left) this.heal();
    else this.penalize();
    const choose = () => (settings.temperature === 0 ? z.indexOf(z.reduce((a, b) => Math.max(a, b))) :
      this.draw(filter(this.probs, z, this.scratch, settings)));
    let id = choose();
    if (!this.allows(id)) { // a broken character: choose from the rest of what the filters left, or filter the rest
      for (let v = 0; v < V; v++) if (!this.allows(v)) [z[v], this.probs[v]] = [-Infinity, 0];
      id = settings.temperature && this.probs.some((p) => p) ? this.draw(this.probs) : choose();
    }
    this.push([id]);
    this.decoder.push(this.bytes[id] ?? "");
    if (this.rest?.left) this.rest.push(id);
    return id;
  }

  // Keeps what can write the rest of the prompt, without penalties.
  heal() {
    this.rest.given(this.z);
    this.own.set(this.z);
  }

  allows(id) {
    return this.decoder.allows(this.bytes[id] ?? "");
  }

  penalize() {
    const { z, settings: { repetition_penalty } } = this;
    for (const id of this.seen) z[id] = z[id] > 0 ? z[id] / repetition_penalty : z[id] * repetition_penalty;
    const repeats = this.settings.no_repeat_ngram ? this.ngrams.get(this.tail.join()) : undefined;
    if (!repeats) return;
    this.scratch.set(z);
    for (const id of repeats) z[id] = -Infinity;
    if (z.every((value, id) => value === -Infinity || !this.allows(id))) z.set(this.scratch);
  }

  draw(probs) {
    let total = 0, sum = 0, id = 0;
    for (let v = 0; v < this.V; v++) total += probs[v];
    const point = this.random() * total;
    for (let v = 0; v < this.V; v++) {
      if (!probs[v]) continue;
      id = v;
      if ((sum += probs[v]) > point) break;
    }
    return id;
  }

  // How probable the model found `id`, before penalties and filters, and the likeliest others: [id, probability] each.
  explain(id, n = 5) {
    const { own, V } = this, total = logSumExp(own, 0, V), best = [];
    for (let v = 0; v < V; v++) {
      if (v === id || own[v] === -Infinity || (best.length === n && own[v] <= own[best[n - 1]])) continue;
      let place = best.length;
      while (place && own[best[place - 1]] < own[v]) place--;
      best.splice(place, 0, v);
      if (best.length > n) best.pop();
    }
    return { p: Math.exp(own[id] - total), others: best.map((v) => [v, Math.exp(own[v] - total)]) };
  }
}

function logSumExp(x, at, n) {
  let largest = -Infinity, sum = 0;
  for (let i = at; i < at + n; i++) if (x[i] > largest) largest = x[i];
  for (let i = at; i < at + n; i++) sum += Math.exp(x[i] - largest);
  return largest + Math.log(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// the ends of a passage, as in robopoet/writing/passage.py

const S_ = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]"; // Python's \s
const V_ = S_.replace("[", "[^"); // and \S
const SPEAKER = "(?:[A-Z][A-Z .,'’&\\-]+|[A-Z][\\p{L}\\p{N}_ .,'’\\-]*:)";
const SPEECH = new RegExp(`(?:^|\\n)${SPEAKER}\\n(?=[^\\n]*${V_})`, "u"); // anywhere in a text
const SPEECH_FIRST = new RegExp(`^${SPEAKER}\\n(?=[^\\n]*${V_})`, "u"); // at its start
const ENDS = Object.fromEntries(Object.entries({
  word: `${V_}(?=${S_})`,
  line: `${V_}(?=[ \\t]*\\n)`,
  sentence: `[.!?]["')\\]’”]*(?=${S_})`,
  paragraph: `${V_}(?=[ \\t]*\\n[ \\t]*\\n)`,
  speech: `${V_}(?=[ \\t]*\\n[ \\t]*\\n)`,
  scene: `${V_}(?=${S_}*\\n(?:ACT|SCENE) )`,
}).map(([unit, source]) => [unit, new RegExp(source, "gu")]));
const SPACE = new RegExp(`^${S_}$`, "u"), VISIBLE = new RegExp(V_, "u");
const MAX_HELD = 4000, LOOK_BEHIND = 10_000;

function ends(text, unit, start) {
  const pattern = ENDS[unit], found = [];
  pattern.lastIndex = Math.max(start - 50, 0);
  for (let match; (match = pattern.exec(text));) {
    const end = match.index + match[0].length;
    if (end < start) continue;
    if (unit !== "speech" || SPEECH_FIRST.test(text.slice(0, end).split("\n\n").at(-1))) found.push(end);
  }
  return found;
}

class Passage {
  // skip: how many bytes its tokens write of the prompt before its text begins.
  constructor(tokenizer, settings, prompt, skip = 0) {
    Object.assign(this, { tokenizer, settings, skip, decoder: new Utf8Decoder(), done: false, count: 0 });
    Object.assign(this, { before: prompt.slice(-LOOK_BEHIND), held: "", blank: true, drama: SPEECH.test(prompt) });
    this.waiting = []; // [text, note] of tokens whose text is not fully released
    this.waits = settings.until !== "auto" && settings.until !== "tokens"; // for the first complete unit
  }

  // Appends a token with a note on it; returns the text that is released, as [text, note] of each token.
  push(id, note) {
    const bytes = this.tokenizer.bytes[id] ?? "", skip = this.skip;
    this.skip = Math.max(skip - bytes.length, 0);
    if (skip && bytes.length <= skip) return [];
    this.count++;
    if (id === this.tokenizer.specials.get("<|endoftext|>")) return this.end(this.held.length);
    const piece = this.decoder.push(bytes.slice(skip));
    if (piece) this.waiting.push([piece, note]);
    for (const part of this.settings.stop.length || this.waits ? piece : [piece]) {
      this.held += part;
      const found = [];
      for (const stop of this.settings.stop) if (this.held.endsWith(stop)) found.push(this.held.length - stop.length);
      if (this.waits && SPACE.test(part)) found.push(...this.ends(this.settings.until));
      if (found.length) return this.end(Math.min(...found));
    }
    this.drama ||= piece.includes("\n") && SPEECH.test(this.before + this.held);
    return this.release(this.releasable());
  }

  // No more tokens come; the bytes of a character that is unfinished are no text.
  finish() {
    this.drama ||= SPEECH.test(this.before + this.held);
    for (const unit of this.settings.until === "tokens" ? [] : [this.autoUnit(), "sentence", "line", "word"]) {
      const found = this.ends(unit);
      if (found.length) return this.end(found.at(-1));
    }
    return this.end(this.held.length);
  }

  autoUnit() {
    return this.drama ? "speech" : "sentence";
  }

  ends(unit) {
    const start = this.before.length;
    const found = ends(this.before + this.held, unit, start).map((end) => end - start);
    return found.filter((end) => !this.blank || VISIBLE.test(this.held.slice(0, end)));
  }

  releasable() {
    const { until, max_new_tokens, stop } = this.settings, length = this.held.length;
    let n = length;
    if (until !== "tokens" && this.count > Math.floor(max_new_tokens / 2)) {
      n = this.ends(this.autoUnit()).at(-1) ?? 0;
    } else if (this.waits) {
      n = Math.max(this.held.lastIndexOf("\n"), 0);
      while (n && SPACE.test(this.held[n - 1])) n--;
    }
    let begun = 0;
    for (const text of stop) {
      for (let k = 1; k < text.length; k++) if (this.held.endsWith(text.slice(0, k))) begun = Math.max(begun, k);
    }
    return Math.min(Math.max(n, length - MAX_HELD), length - begun);
  }

  release(n) {
    const released = this.held.slice(0, n), parts = [];
    for (let left = n; left > 0;) {
      const [text, note] = this.waiting[0];
      parts.push([text.slice(0, left), note]);
      if (text.length > left) this.waiting[0] = [text.slice(left), note];
      else this.waiting.shift();
      left -= text.length;
    }
    this.held = this.held.slice(n);
    this.before = (this.before + released).slice(-LOOK_BEHIND);
    this.blank &&= !VISIBLE.test(released);
    return parts;
  }

  end(n) {
    this.done = true;
    return this.release(n);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// the poet

class Poet {
  // about: what html.py writes: config, tokenizer, dtype. weights: name -> base64.
  constructor(about, weights) {
    this.tokenizer = new Tokenizer(about.tokenizer);
    this.model = new Model(about.config, weights, Math.max(this.tokenizer.specials.size, 1));
    this.forbidden = [];
    for (const [name, id] of this.tokenizer.specials) if (name !== "<|endoftext|>") this.forbidden.push(id);
    for (let id = this.tokenizer.size; id < about.config.vocab_size; id++) this.forbidden.push(id); // nanoGPT's padding
  }

  windowStart(n) {
    const { block_size, positions } = this.model.config, beyond = n - block_size;
    const step = positions === "rotary" ? 1 : Math.max(Math.floor(block_size / 2), 1);
    return Math.max(Math.ceil(beyond / step) * step, 0);
  }

  // Continues a prompt; yields [text, note] of the tokens whose text is released, and null while the prompt is read.
  *write(prompt, given = {}) {
    const { model, tokenizer } = this, settings = { ...DEFAULTS, ...given };
    const blend = Object.entries(settings.style).filter(([, share]) => share > 0);
    const tags = blend.map(([name]) => tokenizer.specials.get(`<|${name}|>`));
    const total = blend.reduce((sum, [, share]) => sum + share, 0);
    const weights = blend.length ? blend.map(([, share]) => share / total) : [1];
    const { read: ids, own } = heal(tokenizer, prompt);
    if (!ids.length) throw new Error("The model knows none of these characters.");
    const all = tags.length ? [tags[0], ...ids] : ids;
    const rest = new Rest(tokenizer.bytes, own), V = model.config.vocab_size;
    const sampler = new Sampler(settings, V, this.forbidden, weights, all, tokenizer.bytes, rest);
    const passage = new Passage(tokenizer, settings, prompt, rest.left.length);
    const window = all.slice(this.windowStart(all.length));
    model.start(weights.length);
    let isCached = false, id = 0;
    while (passage.count < settings.max_new_tokens) {
      if (isCached) model.step(id);
      else yield* model.read(window, tags);
      if (!rest.odds) yield* this.weigh(rest, window, tags, weights);
      const cut = rest.left.length; // bytes of the next token that are the prompt's
      id = sampler.next(model.logits);
      isCached = true;
      if (!model.isRotary) {
        window.push(id);
        const start = this.windowStart(window.length); // the keys of learned positions can't move
        window.splice(0, start);
        isCached = !start;
      }
      yield passage.push(id, this.note(sampler.explain(id), cut));
      if (passage.done) return;
    }
    yield passage.finish();
  }

  // Looks ahead along a prompt's own ids, from a window that the model has just read.
  *weigh(rest, window, tags, weights) {
    const { model } = this, V = model.config.vocab_size, logits = model.logits.slice(), found = [];
    for (const id of rest.own.slice(0, -1)) {
      model.step(id);
      const z = new Float64Array(V);
      weights.forEach((weight, row) => {
        const mean = logSumExp(model.logits, row * V, V);
        for (let v = 0; v < V; v++) z[v] += weight * (model.logits[row * V + v] - mean);
      });
      const total = logSumExp(z, 0, V);
      found.push(z.map((x) => x - total));
    }
    rest.weigh(found);
    if (window.length + found.length > model.config.block_size) { // the first of its keys are overwritten
      model.start(weights.length);
      yield* model.read(window, tags);
    } else {
      model.length = window.length;
      model.logits.set(logits);
    }
  }

  // A token's probability and the likeliest others, with their text from byte `cut` on; of a part of a character its
  // bytes, as <e4 bd>.
  note({ p, others }, cut = 0) {
    const name = (id) => {
      const decoder = new Utf8Decoder(), bytes = (this.tokenizer.bytes[id] ?? "").slice(cut);
      const text = decoder.push(bytes);
      if (!decoder.errors && !decoder.missing) return text;
      return `<${[...bytes].map((byte) => byte.charCodeAt(0).toString(16)).join(" ")}>`;
    };
    const possible = cut ? others.filter(([id]) => this.tokenizer.bytes[id].length > cut) : others;
    return { p, others: possible.map(([id, q]) => [name(id), q]) };
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// in a Worker: {about}, then {name, base64} of each tensor, {open}; then {run, write, settings} and {stop}

const SLICE_MS = 12; // between two messages to the page, and between two looks for a message from it

if (typeof WorkerGlobalScope !== "undefined") {
  const weights = {}, next = new MessageChannel(); // a timer would wait 4 ms after each token
  let about, poet, steps, run;
  onmessage = ({ data }) => {
    if (data.about) about = data.about;
    else if (data.name) weights[data.name] = decodeWeights(data.base64, about.dtype);
    else if (data.stop) steps = null;
    else if (data.open) {
      poet = new Poet(about, weights);
      postMessage({ isOpen: true });
    } else {
      run = data.run;
      steps = poet.write(data.write, data.settings);
      next.port2.postMessage(run);
    }
  };
  next.port1.onmessage = ({ data }) => {
    if (!steps || data !== run) return; // stopped, or begun anew
    const news = { run, parts: [], count: 0, done: false }, begun = performance.now();
    try {
      while (!news.done && performance.now() - begun < SLICE_MS) {
        const { value, done } = steps.next();
        news.done = done;
        news.parts.push(...(value ?? []));
        if (value) news.count++; // tokens
      }
    } catch (error) {
      Object.assign(news, { done: true, error: error.message });
    }
    postMessage(news);
    if (!news.done) next.port2.postMessage(run);
  };
}
