"""How a data set lies on disk and becomes batches."""
