"""The TensorRT backend, for the modules `tensorrt` and `tensorrt_rtx`: the target says which."""
