"""Statistics -> refusal directions: methods, selection of the layer, and the ``.pt`` file with its sidecar."""
