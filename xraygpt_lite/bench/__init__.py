"""How fast a bundle is here, stage by stage, and how near to what the machine could do."""
