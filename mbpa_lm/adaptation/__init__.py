"""The paper: neighbours to an adapted softmax. Tensors in, tensors out; no model, no memory, no configuration.

Two solvers with one signature give the log-probabilities of each query under its own adapted layer:

    log_probabilities_BV = solve(weight_Vd, bias_V, keys_BKd, values_BK, weights_BK, queries_Bd, rule)

`reference.solve` is the definition, by autograd on a copy of the layer; `dual.solve` is exact without the copy.
"""
