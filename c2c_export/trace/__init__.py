"""From torch modules to portable ONNX graphs: decoders (receiver and sharers) and fusers."""
