"""Interpreters that perturb the input and evaluate the classifier: occlusion, RISE, LIME, KernelSHAP."""
