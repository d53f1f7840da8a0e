"""What a channel is worth: measures, statistics, question sets, and the record of a run. No models in here."""
