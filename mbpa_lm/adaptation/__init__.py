"""The paper: neighbours to an adapted softmax. Tensors in, tensors out; no model, no memory, no configuration.

Three solvers with one signature give each query's log-probabilities under its own adapted layer, of the whole vocabulary
(B, V), or of one target a query (B,):

    log_probabilities = solve(problem, rule, targets_B)

`reference.solve` is the definition, by autograd on a copy of the layer; `dual.solve` is exact without the copy;
`restricted.solve` moves only the words that the steps can move most, at a cost that does not depend on the vocabulary.
"""
