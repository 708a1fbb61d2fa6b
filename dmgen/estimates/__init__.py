"""Numbers with errors: scores, importance weights, divergences and intervals."""
