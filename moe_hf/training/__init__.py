"""Arguments, data, the Trainer subclass and its callbacks: everything between a command line and a trained model."""
