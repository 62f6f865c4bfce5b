"""Who is compared: each peer is a small adapter that builds a layer or a model, or says why it cannot."""
