"""Train a language model: python train.py --config configs/ptb_lstm.yaml [--model.hidden_size 650 ...]"""

from mbpa_lm.commands import train

if __name__ == "__main__":
    raise SystemExit(train())
