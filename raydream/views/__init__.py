"""Rendered views of assets: what is rendered, by whom, the Parquet form it is kept in, and reading it back."""
