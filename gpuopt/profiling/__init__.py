"""Runner -> records: FLOPs and bytes counted, time traced, both set against the ceilings."""
