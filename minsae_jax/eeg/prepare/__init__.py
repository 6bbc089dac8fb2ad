"""EEG files of any format that MNE reads → recordings with a description: `minsae prepare`."""
