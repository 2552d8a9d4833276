"""Language models as one more source of feedback, asked after episodes end."""
