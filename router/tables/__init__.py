"""Where routing tables come from, and who hears that one is served."""
