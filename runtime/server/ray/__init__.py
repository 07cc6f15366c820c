"""Replicas of the server's engine on a Ray cluster. The application that deploys them is `runtime.server.ray_app`.

`import ray`, here as elsewhere, is the library: imports in this repository are absolute.
"""
