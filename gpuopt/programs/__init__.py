"""PyTorch programs traced, stored and weighed: what converters and backends both need, and neither owns."""
