"""Acting on prototypes: interventions as files, suppression of behaviours, controllers, and their traces to data."""
