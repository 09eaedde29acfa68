"""Pictures from one ONNX file. Imports NumPy, Pillow and onnxruntime, nothing else of this project."""
