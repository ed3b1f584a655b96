"""How good a representation is: functions from features and labels to figures."""
