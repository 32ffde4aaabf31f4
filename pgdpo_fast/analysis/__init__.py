"""What a run did to its model: displacement figures, sample clips, and one self-contained report for any run."""
