"""What a trained model uses: attributions, gene programmes, known marker genes."""
