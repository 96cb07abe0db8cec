"""The method: inventory, routing, assembly, adapted linears and the formats they come in."""
