"""What texts of requests and answers are searched for, and what becomes of them."""
