"""Runner -> a folder that can be checked, shipped and loaded again; and back. Light: `write` and `read` are imported by who uses them."""

from gpuopt.bundles.manifest import file_of, safe_name, stored_count

__all__ = ["file_of", "safe_name", "stored_count"]
