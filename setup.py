"""Says what to do instead of `pip install .`: there is no package to install."""

raise SystemExit(
    "RoboPoet is run from its checkout: pip install -r requirements.txt, then python train.py, or sample.py; "
    "in Python, from there: from sample import Poet"
)
