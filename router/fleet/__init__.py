"""What is known of replicas and told among routers: loads, caches, speeds, health. Not here: choosing (core)."""
