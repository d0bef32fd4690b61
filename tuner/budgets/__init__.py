"""What a study is going to cost, and what it did."""
