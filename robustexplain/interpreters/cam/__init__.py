"""Interpreters that read a feature map or attention: the CAM family and attention rollout."""
