"""What a traced program is and costs, read from its HLO text: no device, no torch."""
