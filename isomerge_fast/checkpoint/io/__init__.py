"""Read and write the bytes of tensors in a bounded number of bytes, past the page cache where that is faster."""
