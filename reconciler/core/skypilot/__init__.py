"""What SkyPilot is told and what its answers mean. Pure; not here: talking to it (backends.skypilot)."""
