"""The site's processes."""
