"""The label doctor: rules over the samples of a data set."""
