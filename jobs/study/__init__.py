"""A study: runs in stages out of one file, as a sweep or as one job."""
