"""Evidence -> findings: what breaks or slows a model, priced, with the exact change."""
