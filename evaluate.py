"""Score a held-out text: python evaluate.py --config configs/ptb_lstm.yaml --checkpoint runs/ptb_lstm"""

from mbpa_lm.commands import evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate())
