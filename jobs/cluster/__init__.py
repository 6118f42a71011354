"""What runs on a cluster, and how it is described to one."""
