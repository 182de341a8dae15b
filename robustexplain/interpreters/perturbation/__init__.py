"""Interpreters that change the input and watch the answer: occlusion, RISE, LIME, KernelSHAP."""
