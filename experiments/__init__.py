"""Scripts that train, evaluate and sample recurrent models with seqjax."""
