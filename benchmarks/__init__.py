"""The relay beside its peers, and plots of what was measured. No part of the package."""
