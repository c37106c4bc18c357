"""Networks that rewards look at pictures with, and how their published weights are found."""
