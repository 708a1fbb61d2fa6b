"""The target distribution: a base model under constraints, and the fit of its λ."""
