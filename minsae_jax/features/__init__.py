"""What people look at: the features of an autoencoder, their measures, examples and report."""
