"""`evaluate.py --tune`: what has hyper-parameters, fitted on the validation text; one file a kind, all in `everything.py`."""
