"""What is learnt from: tables of labelled pictures, and how they are split."""
