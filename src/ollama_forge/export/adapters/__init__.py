"""An edit as an adapter: a small file that is added to the model while it runs. One file a format."""
