"""Random classifiers as ONNX files, and seeded faults of the exporter that must be refused."""
