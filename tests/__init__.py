"""A package, so that it comes before the one that torch-fidelity installs under the same name."""
