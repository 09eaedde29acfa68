"""Images from one ONNX file. Needs NumPy, Pillow and onnxruntime, and of this project only ``catgan``."""
